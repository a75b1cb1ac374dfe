"""The shipped recipes and profiles, and the scale model with its data. `rl.recipe.layers` reads these files."""
