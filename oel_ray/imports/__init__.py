"""Games and knowledge from elsewhere, checked line by line."""
