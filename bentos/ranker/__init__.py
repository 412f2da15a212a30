"""The ranker: pictures of animals, ordered for a search phrase and a user."""
