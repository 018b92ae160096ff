"""What the attention variants share."""
