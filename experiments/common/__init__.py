"""What the experiments share: data, models, one training loop, run folders, figures."""
