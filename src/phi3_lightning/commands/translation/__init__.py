"""From the literals of a training script to settings of this package."""
