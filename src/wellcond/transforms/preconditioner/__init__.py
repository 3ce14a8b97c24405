"""Feature preconditioners: the transforms, the forms of their second moments, their factors."""
