//! Reads the tables of a format page, so that tests can hold the code to them. Tests of other crates use it, too.

/// Offset, length and description of a field.
pub(crate) type Row = (usize, usize, &'static str);

/// The fields of the table `name`, which follow each other without a gap and fill its stated total.
pub(crate) fn table(page: &'static str, name: &str) -> Vec<Row> {
    let mark = format!("<!-- table: {name}, total ");
    let (_, rest) = page
        .split_once(&mark)
        .unwrap_or_else(|| panic!("the page has {name}"));
    let (total, rest) = rest.split_once(" -->").unwrap();
    let rows: Vec<Row> = rest
        .lines()
        .skip(3)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
            (
                cells[0].parse().unwrap(),
                cells[1].parse().unwrap(),
                cells[2],
            )
        })
        .collect();
    let mut next = 0;
    for &(offset, length, field) in &rows {
        assert_eq!(
            offset, next,
            "{name}: {field} follows what stands before it"
        );
        next = offset + length;
    }
    assert_eq!(next, total.parse::<usize>().unwrap(), "{name}: total");
    rows
}

/// The one field whose description begins so.
pub(crate) fn field<'a>(bytes: &'a [u8], rows: &[Row], begin: &str) -> &'a [u8] {
    let mut found = rows.iter().filter(|(_, _, field)| field.starts_with(begin));
    let (offset, length, _) = found
        .next()
        .unwrap_or_else(|| panic!("the table has {begin}"));
    assert!(found.next().is_none(), "{begin} names one field");
    &bytes[*offset..offset + length]
}
