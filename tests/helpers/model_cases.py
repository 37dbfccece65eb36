"""Models of `transformers`, torchvision and timm, small and with random weights, and what they are called with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from model_zoo import package
from torch import Tensor, nn

from xbraid_py import parallelize, to_sequential
from xbraid_py.layers.module_block import own_random_numbers

LAYERS, WIDTH, TOKENS, SAMPLES, LENGTH = 8, 16, 30, 4, 10


@dataclass
class Case:
    """A model in float64, and how it is used.

    Parameters
    ----------
    model : nn.Module
    inputs : dict
        Of a call of the model.
    score : callable
        A number, from what the model makes of them.
    options : dict
        Of `parallelize`, one for each run of blocks.
    """

    model: nn.Module
    inputs: dict
    score: Callable[[object], Tensor]
    options: list[dict] = field(default_factory=lambda: [{}])

    def loss(self, model: nn.Module) -> Tensor:
        """Of a model that is like this one."""
        inputs = dict(self.inputs)
        first = inputs.pop("x", None)
        return self.score(model(**inputs) if first is None else model(first, **inputs))

    def parallel(self, comm, **more) -> nn.Module:
        """A copy of the model, with its runs in parallel."""
        model = copy.deepcopy(self.model)
        for options in self.options:
            parallelize(model, comm, **options, **more)
        return model


def case(name: str, **changes) -> Case:
    """The case of that name, the same on every rank."""
    with own_random_numbers(0):
        found = CASES[name](**changes)
    found.model.double().train()
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a model, under the names of the plain one; collective; the weights are lost."""
    if any(hasattr(part, "restored") for part in model.modules()):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
        return {name: p.detach() for name, p in to_sequential(model).named_parameters()}
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()  # an unused position, say
        for name, p in model.named_parameters()
    }


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative distance of tensors with the same names; those of no size are measured by the greatest."""
    assert found.keys() == wanted.keys()
    wanted = {name: each.detach() for name, each in wanted.items()}
    greatest = max(float(each.norm()) for each in wanted.values())
    return max(
        float((found[name].detach() - each).norm()) / max(float(each.norm()), 1e-3 * greatest)
        for name, each in wanted.items()
    )


def _tokens(*shape: int) -> Tensor:
    return torch.randint(1, TOKENS, shape)


def _padding() -> Tensor:
    """The last tokens of the first sample are padding."""
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.int64)
    mask[0, -3:] = 0
    return mask


def _gpt2(**changes) -> Case:
    package("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": TOKENS, "n_positions": 16, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**(sizes | none | ends | changes)))
    tokens = _tokens(SAMPLES, LENGTH)
    inputs = {"input_ids": tokens, "attention_mask": _padding(), "labels": tokens}
    return Case(model, inputs, lambda out: out.loss)


def _bert(**changes) -> Case:
    package("transformers")
    from transformers import BertConfig, BertForMaskedLM

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "use_cache": False}
    sizes = {"vocab_size": TOKENS, "max_position_embeddings": 16, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "intermediate_size": 2 * WIDTH, "pad_token_id": 0}
    model = BertForMaskedLM(BertConfig(**(sizes | heads | none | changes)))
    tokens = _tokens(SAMPLES, LENGTH)
    inputs = {"input_ids": tokens, "attention_mask": _padding(), "labels": tokens}
    return Case(model, inputs, lambda out: out.loss)


def _vit(**changes) -> Case:
    package("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_labels": 3}
    heads = {"num_attention_heads": 2, "intermediate_size": 2 * WIDTH}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTForImageClassification(ViTConfig(**(sizes | heads | none | changes)))
    inputs = {"pixel_values": torch.randn(SAMPLES, 3, 8, 8).double(), "labels": torch.arange(SAMPLES) % 3}
    return Case(model, inputs, lambda out: out.loss)


def _llama(**changes) -> Case:
    package("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": TOKENS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2 * WIDTH}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"use_cache": False, "pad_token_id": 0} | changes)))
    tokens = _tokens(SAMPLES, LENGTH)
    inputs = {"input_ids": tokens, "attention_mask": _padding(), "labels": tokens}
    return Case(model, inputs, lambda out: out.loss)


def _t5(**changes) -> Case:
    package("transformers")
    from transformers import T5Config, T5ForConditionalGeneration

    # The first block of each half has the table of position biases: of 9 blocks 8 are alike.
    sizes = {"vocab_size": TOKENS, "d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_heads": 2}
    depth = {"num_layers": LAYERS + 1, "num_decoder_layers": LAYERS + 1, "decoder_start_token_id": 0}
    none = {"dropout_rate": 0.0, "use_cache": False, "initializer_factor": 0.3}
    model = T5ForConditionalGeneration(T5Config(**(sizes | depth | none | changes)))
    inputs = {"input_ids": _tokens(SAMPLES, LENGTH), "attention_mask": _padding(), "labels": _tokens(SAMPLES, 7)}
    both = [{"blocks": f"{half}.block", "returns": 0} for half in ("encoder", "decoder")]
    return Case(model, inputs, lambda out: out.loss, both)


def _images(model: nn.Module, size: int, **options) -> Case:
    images = torch.randn(SAMPLES, 3, size, size).double()
    return Case(model, {"x": images}, lambda out: out.square().mean(), [options])


def _torchvision_vit() -> Case:
    package("torchvision")
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 8, "patch_size": 4, "num_layers": LAYERS, "num_heads": 2, "hidden_dim": WIDTH}
    model = VisionTransformer(**sizes, mlp_dim=2 * WIDTH, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # which is zero: no gradient would reach the blocks
    return _images(model, 8)


def _resnet(norm: Callable[[int], nn.Module] | None = None) -> Case:
    package("torchvision")
    from torchvision.models.resnet import BasicBlock, ResNet

    # In each stage the first block has other pixels and channels; the third stage has 5 alike.
    model = ResNet(BasicBlock, [1, 1, 6, 1], num_classes=3, norm_layer=norm or (lambda n: nn.GroupNorm(4, n)))
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=0.3 / math.sqrt(part.weight[0].numel()))
    return _images(model, 16)


def _timm_vit(**changes) -> Case:
    package("timm")
    from timm.models.vision_transformer import VisionTransformer

    return _images(VisionTransformer(8, 4, embed_dim=WIDTH, depth=LAYERS, num_heads=2, num_classes=3, **changes), 8)


def _torch_encoder(**changes) -> Case:
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True} | changes
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, **options)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    for part in model.layers:  # which are copies of one
        for p in part.parameters():
            p.data += 0.02 * torch.randn_like(p)
    x = torch.randn(SAMPLES, LENGTH, WIDTH).double()
    inputs = {"x": x, "mask": nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)}
    return Case(model, inputs, lambda out: out.square().mean())


CASES = {
    "GPT-2": _gpt2,
    "BERT": _bert,
    "ViT": _vit,
    "Llama": _llama,
    "T5": _t5,
    "torchvision ViT": _torchvision_vit,
    "torchvision ResNet": _resnet,
    "timm ViT": _timm_vit,
    "nn.TransformerEncoder": _torch_encoder,
}
