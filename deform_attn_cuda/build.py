"""Build the compiled operator: `python -m deform_attn_cuda.build`."""
print("deform_attn: nothing to compile yet, the PyTorch fallback is used")
