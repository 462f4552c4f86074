"""What becomes of a trained model."""
