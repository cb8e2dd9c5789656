"""Images in, batches out: sources, the three splits by pixel hash, augmentation, and the order of training."""
