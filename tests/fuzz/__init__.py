"""Files that someone else wrote, damaged on purpose."""
