"""The decoder of DC-AE, which draws the pictures of several families."""
