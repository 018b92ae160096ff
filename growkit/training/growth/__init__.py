"""What training knows of growth: new slots, their rates and gradients, probes, stages."""
