"""How good a run is: clusterings, Fréchet distances, cluster specificity, controls. Pure functions, no files."""
