"""Sets as they lie there, whoever wrote them: finding, opening, listing, importing them."""
