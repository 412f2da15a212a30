"""Client of Ekiben."""
