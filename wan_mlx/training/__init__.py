"""LoRA training: the data set, the loss and its gradients block by block, the loop, and the file that it writes."""
