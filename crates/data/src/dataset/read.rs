//! Files of rows, read one row at a time.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::Value;

use crate::error::{Error, Location, Result, RowPosition};

/// Calls `each` for every row of a JSONL file or a JSON array. Which it is, is told by the first character: `[` or not.
/// A byte order mark at the start and empty lines are skipped.
pub(super) fn for_each_row(path: &Path, mut each: impl FnMut(Location, Value) -> Result<()>) -> Result<()> {
    let io_error = |source| Error::Read { path: path.to_owned(), source };
    let mut reader = BufReader::with_capacity(1 << 16, File::open(path).map_err(io_error)?);
    let start = reader.fill_buf().map_err(io_error)?;
    if start.starts_with(b"\xEF\xBB\xBF") {
        reader.consume(3);
    }
    let start = reader.fill_buf().map_err(io_error)?;
    if start.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[') {
        array(path, reader, &mut each)
    } else {
        lines(path, reader, &mut each)
    }
}

fn lines(path: &Path, mut reader: impl BufRead, each: &mut impl FnMut(Location, Value) -> Result<()>) -> Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line);
        if read.map_err(|source| Error::Read { path: path.to_owned(), source })? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let location = Location { path: Some(path.to_owned()), row: RowPosition::Line(number) };
        match serde_json::from_slice(&line) {
            Ok(row) => each(location, row)?,
            Err(source) => {
                // An unfinished line ends after its last character, not at the start of the next line.
                let column = if source.line() > 1 { line.trim_ascii_end().len() } else { source.column() };
                return Err(Error::BrokenRow { location, column, source });
            }
        }
    }
    Ok(())
}

fn array(path: &Path, reader: impl BufRead, each: &mut impl FnMut(Location, Value) -> Result<()>) -> Result<()> {
    let mut stopped = None;
    let mut json = serde_json::Deserializer::from_reader(reader);
    let rows = Rows { path, each, stopped: &mut stopped };
    let parsed = rows.deserialize(&mut json).and_then(|()| json.end());
    match (stopped, parsed) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(source)) if source.is_io() => Err(Error::Read { path: path.to_owned(), source: source.into() }),
        (None, Err(source)) => {
            let (line, column) = (source.line(), source.column());
            Err(Error::BrokenFile { path: path.to_owned(), line, column, source })
        }
    }
}

/// Visits the items of an array without keeping them; an error of `each` is put aside, for it is no JSON error.
struct Rows<'a, F> {
    path: &'a Path,
    each: &'a mut F,
    stopped: &'a mut Option<Error>,
}

impl<'de, F: FnMut(Location, Value) -> Result<()>> DeserializeSeed<'de> for Rows<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(Location, Value) -> Result<()>> Visitor<'de> for Rows<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<(), A::Error> {
        let mut number = 0;
        while let Some(row) = items.next_element()? {
            number += 1;
            let location = Location { path: Some(self.path.to_owned()), row: RowPosition::Item(number) };
            if let Err(error) = (self.each)(location, row) {
                *self.stopped = Some(error);
                return Err(serde::de::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}
