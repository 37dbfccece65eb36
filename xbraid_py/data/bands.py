"""Symmetric banded matrices of one pattern, one for each sample, and their solution by Cholesky factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, solveh_banded
from scipy.sparse import csr_array, dia_array

_UNSOLVED = "the coefficients differ too much, or are too large, for a solve"


@dataclass(frozen=True, eq=False)
class BandPattern:
    """Symmetric matrices on one pattern whose entries are linear in a vector of coefficients.

    Attributes
    ----------
    size : int
        Unknowns.
    lower : scipy.sparse.csr_array
        Takes the coefficients to the lower triangle in LAPACK's band storage, row after row: entry (i, j) of the
        matrix stands at (i - j) * size + j.
    """

    size: int
    lower: csr_array

    @classmethod
    def build(cls, size: int, rows, columns, coefficients, values, num_coefficients: int) -> BandPattern:
        """From triplets: `values[t]` times coefficient number `coefficients[t]` is added at (rows[t], columns[t]).

        All arguments but the two numbers have the same shape. Of each pair (i, j), (j, i) both are given; those above
        the diagonal are left out here.
        """
        kept = np.asarray(rows) >= np.asarray(columns)
        rows, columns, coefficients, values = (np.asarray(part)[kept] for part in (rows, columns, coefficients, values))
        places = (rows - columns) * size + columns
        bands = int((rows - columns).max()) + 1
        return cls(size, csr_array((values, (places, coefficients)), shape=(bands * size, num_coefficients)))

    def band(self, coefficients: np.ndarray) -> np.ndarray:
        """The lower triangle in band storage, (bandwidth + 1, size)."""
        return (self.lower @ coefficients).reshape(-1, self.size)

    def matrix(self, coefficients: np.ndarray) -> csr_array:
        """The whole matrix, (size, size)."""
        band = self.band(coefficients)
        lower = dia_array((band, -np.arange(len(band))), shape=(self.size, self.size)).tocsr()
        strict = dia_array((band[1:], -np.arange(1, len(band))), shape=(self.size, self.size)).tocsr()
        return lower + strict.T.tocsr()

    def solve(self, coefficients: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Solution for the right side `right`, both (size,), by a banded Cholesky factorization.

        Raises
        ------
        ValueError
            If the matrix is not positive definite in the numbers of this machine.
        """
        try:
            found = solveh_banded(self.band(coefficients), right, overwrite_ab=True, lower=True, check_finite=False)
        except LinAlgError as error:
            raise ValueError(f"{_UNSOLVED} ({error}); use ratios below 1e12") from error
        if not np.isfinite(found).all():
            raise ValueError(f"{_UNSOLVED} (overflow); use values near 1")
        return found
