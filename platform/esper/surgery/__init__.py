"""Surgery: finding sites in any model, attaching lattices, folding them away, saving them."""
