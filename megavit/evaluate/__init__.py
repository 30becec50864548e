"""How good a model is: protocols on its frozen features, over data sets in the form in which they are
downloaded."""
