"""What the methods that the paper compares with need: regular expressions, other models, DPO."""
