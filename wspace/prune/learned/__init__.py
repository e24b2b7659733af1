"""What taking a unit away does to the loss: measured, predicted from weights, and made smaller."""
