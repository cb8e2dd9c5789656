"""What is trained: model families behind `Denoiser`, the objective, the projections, the routed ensemble."""
