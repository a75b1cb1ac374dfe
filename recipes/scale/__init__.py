"""The scale model, its judge and its data, and the programs that made them."""
