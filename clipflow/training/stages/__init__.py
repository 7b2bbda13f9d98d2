"""What each kind of training is: its data and its loss. `STAGE` in each module is the class."""
