"""The shared model as a pure function of its tensors."""
