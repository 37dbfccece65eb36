"""The papers' studies: what they run, and the tables and pictures they leave; not part of the library."""
