"""Every probe on one model, and the page that shows them."""
