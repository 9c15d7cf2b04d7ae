"""What goes out of the house: the model card, and publishing on the Hub."""
