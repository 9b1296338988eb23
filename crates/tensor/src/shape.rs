//! Sizes of a contiguous tensor.

/// Up to four sizes, outermost first; the last one is contiguous in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 4],
    rank: u8,
}

impl Shape {
    /// The sizes.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// Product of the sizes (1 for a scalar).
    #[must_use]
    pub fn numel(&self) -> usize {
        self.dims().iter().product()
    }

    /// The last size (1 for a scalar).
    #[must_use]
    pub fn last(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    pub(crate) fn set_first(&mut self, size: usize) {
        self.dims[0] = size;
    }

    /// Number of rows when all but the last size are taken together.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.dims().split_last().map_or(1, |(_, outer)| outer.iter().product())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(sizes: [usize; N]) -> Self {
        const { assert!(N <= 4, "a shape has at most four sizes") };
        let mut dims = [1; 4];
        dims[..N].copy_from_slice(&sizes);
        Self { dims, rank: N as u8 }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(")?;
        for (i, size) in self.dims().iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{size}")?;
        }
        f.write_str(if self.rank == 1 { ",)" } else { ")" })
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// `n` rounded up to one of `per_octave` sizes (a power of two) from each power of two to the next, so that sizes that differ a little
/// are one.
#[must_use]
pub fn size_class(n: usize, per_octave: usize) -> usize {
    n.next_multiple_of((1 << n.max(1).ilog2()) / per_octave.min(1 << n.max(1).ilog2()))
}

#[cfg(test)]
mod tests {
    use super::{Shape, size_class};

    #[test]
    fn classes_are_little_larger_few_and_stable() {
        for per_octave in [4, 8, 16] {
            let classes: Vec<usize> = (0..5000).map(|n| size_class(n, per_octave)).collect();
            for (n, &class) in classes.iter().enumerate() {
                assert!(class >= n && class * per_octave <= n * (per_octave + 1), "{n} {class}");
                assert_eq!(size_class(class, per_octave), class);
            }
            assert!(classes.is_sorted());
            assert_eq!(
                (1025..=2048).map(|n| size_class(n, per_octave)).collect::<std::collections::BTreeSet<_>>().len(),
                per_octave
            );
        }
    }

    #[test]
    fn rows_times_last_is_numel() {
        for shape in [Shape::from([]), [3].into(), [2, 5].into(), [2, 3, 4].into()] {
            assert_eq!(shape.rows() * shape.last(), shape.numel());
        }
    }

    #[test]
    fn prints_like_the_reference_stack() {
        assert_eq!(Shape::from([16, 4096]).to_string(), "(16, 4096)");
        assert_eq!(Shape::from([16]).to_string(), "(16,)");
        assert_eq!(Shape::from([]).to_string(), "()");
    }
}
