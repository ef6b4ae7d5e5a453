"""Weights of the networks, each module on top of the one before it.

`layouts` has the published names of tensors. `component` reads one network's file under the official names, and
`configs` finds the network's sizes in it; `parameters` turns tensors into parameters (`quantize`, `gguf_blocks`,
`lora`); `stream` fills modules with them, with `prefetch` and `set_loras`; `load` loads whole networks. `checkpoint`
finds the files of a model's parts.
"""
