"""Publishing on the Hub. May import `report` and below."""
