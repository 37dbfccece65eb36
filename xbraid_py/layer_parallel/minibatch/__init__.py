"""Training of torch modules on minibatches: updates, state, and whether ranks hold one model."""
