"""Two folders compared: by the plan that grew one from the other, or entry by entry."""
