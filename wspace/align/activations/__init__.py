"""Units compared by what they compute: moments of activations, pairs, and reports."""
