"""Import games and knowledge from elsewhere, checked line by line."""
