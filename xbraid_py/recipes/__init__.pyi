from . import (
    classification as classification,
    digits as digits,
    finetune as finetune,
    images as images,
    mgopt as mgopt,
    pictures as pictures,
    sequences as sequences,
    text as text,
    translate as translate,
    width as width,
)
from .networks import network as network
from .options.classification import ClassificationOptions as ClassificationOptions
from .options.device import DeviceOptions as DeviceOptions
from .options.digits import (
    DigitOptions as DigitOptions,
    MnistOptions as MnistOptions,
    SequenceOptions as SequenceOptions,
)
from .options.images import (
    ImageOptions as ImageOptions,
    ImageRunOptions as ImageRunOptions,
    MultiLevelOptions as MultiLevelOptions,
)
from .options.mgopt import (
    CirclesOptions as CirclesOptions,
    MGOptRunOptions as MGOptRunOptions,
    MnistColumnsOptions as MnistColumnsOptions,
)
from .options.minibatch import MinibatchOptions as MinibatchOptions
from .options.transformers import (
    AdamWOptions as AdamWOptions,
    FinetuneOptions as FinetuneOptions,
    TextOptions as TextOptions,
    TranslateOptions as TranslateOptions,
)
from .options.width import (
    DarcyOptions as DarcyOptions,
    PoissonOptions as PoissonOptions,
    WidthNetwork as WidthNetwork,
    WidthRunOptions as WidthRunOptions,
)
