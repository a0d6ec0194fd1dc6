//! Printing: tables for people, JSON for programs, from the same values.

use super::BoxError;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use std::io::{self, Write as _};

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A table.
    Table,
    /// One JSON document.
    Json,
}

/// What a table shows of a value.
pub(crate) trait Row: Serialize {
    /// Column heads.
    const HEAD: &'static [&'static str];
    /// One cell a head.
    fn cells(&self) -> Vec<String>;
}

/// Prints a list.
pub(crate) fn list<T: Row>(format: Format, rows: &[T]) -> Result<(), BoxError> {
    match format {
        Format::Json => json(&rows),
        Format::Table if rows.is_empty() => line("none"),
        Format::Table => {
            let mut table = Table::new();
            table.load_preset(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
            table.set_header(T::HEAD);
            for row in rows {
                table.add_row(row.cells().iter().map(|cell| printable(cell)));
            }
            line(&table.to_string())
        }
    }
}

/// Prints one value: as a list of one, or as a JSON object.
pub(crate) fn one<T: Row>(format: Format, row: &T) -> Result<(), BoxError> {
    match format {
        Format::Json => json(row),
        Format::Table => list(format, std::slice::from_ref(row)),
    }
}

/// Prints what was done: a sentence, or the object as JSON.
pub(crate) fn done<T: Serialize>(format: Format, sentence: &str, object: &T) -> Result<(), BoxError> {
    match format {
        Format::Json => json(object),
        Format::Table => line(sentence),
    }
}

/// Prints JSON.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> Result<(), BoxError> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Prints one line. A reader that has gone away (`| head`) is no error.
pub(crate) fn line(text: &str) -> Result<(), BoxError> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Text that nodes may have had a hand in, without what could command a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// The same in one line.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Milliseconds since the epoch as a time that people read.
pub(crate) fn time(ms: i64) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000);
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z");
    time.ok().and_then(|time| time.format(&format).ok()).unwrap_or_else(|| ms.to_string())
}

/// Octets as people read them.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d8_terminals_are_not_commanded_by_what_nodes_say() {
        assert_eq!(printable("a\u{1b}[31mb\r\nc"), "a\u{fffd}[31mb\u{fffd}\nc");
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(time(1_700_000_000_123), "2023-11-14 22:13:20Z");
    }
}
