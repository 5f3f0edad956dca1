"""Results: the files they are kept in, the page and the pictures made of them."""
