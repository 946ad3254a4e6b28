//! Lays out text in columns.

/// Columns as wide as their widest cell: the first `left` of them aligned left, the others right.
pub fn columns(header: &[&str], rows: &[Vec<String>], left: usize) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widths = cells.map(|cell| cell.chars().count());
        widths
            .chain([header[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    let header: Vec<String> = header.iter().map(|&cell| cell.to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            if column > 0 {
                line.push_str("  ");
            }
            line.push_str(&match column < left {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            });
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `1.23`, or a dash where there is nothing to compare with.
pub fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["a".to_owned(), "10.5".into()],
            vec!["long name".into(), "7".into()],
        ];
        assert_eq!(
            columns(&["kernel", "us"], &rows, 1),
            "kernel       us\na          10.5\nlong name     7\n"
        );
        assert_eq!(ratio(None), "-");
        assert_eq!(ratio(Some(1.204)), "1.20");
    }
}
