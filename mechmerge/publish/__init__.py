"""What goes out of the house: the model card."""
