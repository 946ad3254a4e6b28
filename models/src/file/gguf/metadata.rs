//! Typed key/value metadata of a GGUF file. Strings and arrays borrow from the file.

use std::collections::HashMap;

use super::cursor::Cursor;
use crate::Error;
use crate::error::shown;

/// How deep arrays of arrays may nest.
pub const MAX_ARRAY_DEPTH: usize = 4;
/// Longest key in bytes, as the format states.
pub const MAX_KEY_BYTES: usize = 65_535;

/// Type of a metadata value, by GGUF id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ValueType {
    /// Unsigned 8-bit integer.
    U8 = 0,
    /// Signed 8-bit integer.
    I8 = 1,
    /// Unsigned 16-bit integer.
    U16 = 2,
    /// Signed 16-bit integer.
    I16 = 3,
    /// Unsigned 32-bit integer.
    U32 = 4,
    /// Signed 32-bit integer.
    I32 = 5,
    /// 32-bit float.
    F32 = 6,
    /// One byte, 0 or 1.
    Bool = 7,
    /// UTF-8 with a 64-bit length.
    String = 8,
    /// Element type, 64-bit count, elements.
    Array = 9,
    /// Unsigned 64-bit integer.
    U64 = 10,
    /// Signed 64-bit integer.
    I64 = 11,
    /// 64-bit float.
    F64 = 12,
}

impl ValueType {
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type with this GGUF id.
    pub fn from_id(id: u32) -> Option<ValueType> {
        Self::ALL.get(id as usize).copied()
    }

    /// Fewest bytes that one value takes in a file; exact for all but strings and arrays.
    fn least_bytes(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }

    /// Name for messages.
    pub fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "a u8",
            ValueType::I8 => "an i8",
            ValueType::U16 => "a u16",
            ValueType::I16 => "an i16",
            ValueType::U32 => "a u32",
            ValueType::I32 => "an i32",
            ValueType::F32 => "an f32",
            ValueType::Bool => "a bool",
            ValueType::String => "a string",
            ValueType::Array => "an array",
            ValueType::U64 => "a u64",
            ValueType::I64 => "an i64",
            ValueType::F64 => "an f64",
        }
    }
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// Unsigned 8-bit integer.
    U8(u8),
    /// Signed 8-bit integer.
    I8(i8),
    /// Unsigned 16-bit integer.
    U16(u16),
    /// Signed 16-bit integer.
    I16(i16),
    /// Unsigned 32-bit integer.
    U32(u32),
    /// Signed 32-bit integer.
    I32(i32),
    /// 32-bit float.
    F32(f32),
    /// Truth value.
    Bool(bool),
    /// Text.
    String(&'a str),
    /// Values of one type.
    Array(Array<'a>),
    /// Unsigned 64-bit integer.
    U64(u64),
    /// Signed 64-bit integer.
    I64(i64),
    /// 64-bit float.
    F64(f64),
}

impl Value<'_> {
    /// Type of the value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// Any integer type, as one that holds them all.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }
}

/// An array of one element type, left in the file: elements are read as they are iterated, so an
/// array costs no memory. Its bytes were checked when the file was parsed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Type of the elements.
    pub fn element(&self) -> ValueType {
        self.element
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as the file stores them.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements in order.
    pub fn iter(&self) -> Elements<'a> {
        Elements {
            element: self.element,
            left: self.len,
            cursor: Cursor::new(self.bytes),
        }
    }

    fn describe(&self) -> String {
        format!("an array whose elements are {}", self.element.name())
    }
}

/// Iterator over the elements of an [`Array`].
#[derive(Debug, Clone)]
pub struct Elements<'a> {
    element: ValueType,
    left: usize,
    cursor: Cursor<'a>,
}

impl<'a> Iterator for Elements<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        // Parsing has walked these bytes already, so this reads without error.
        read_value(&mut self.cursor, self.element, "array element", 0).ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Elements<'_> {}

/// Reads one value of a known type.
pub(super) fn read_value<'a>(
    cursor: &mut Cursor<'a>,
    value_type: ValueType,
    what: &str,
    depth: usize,
) -> Result<Value<'a>, Error> {
    Ok(match value_type {
        ValueType::U8 => Value::U8(u8::from_le_bytes(cursor.array(what)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(cursor.array(what)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(cursor.array(what)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(cursor.array(what)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(cursor.array(what)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(cursor.array(what)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(cursor.array(what)?)),
        ValueType::U64 => Value::U64(u64::from_le_bytes(cursor.array(what)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(cursor.array(what)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(cursor.array(what)?)),
        ValueType::Bool => match cursor.array::<1>(what)? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => {
                return Err(Error::Malformed {
                    what: what.to_owned(),
                    reason: format!("a bool is 0 or 1, not {other}"),
                });
            }
        },
        ValueType::String => Value::String(cursor.string(what)?),
        ValueType::Array => Value::Array(read_array(cursor, what, depth + 1)?),
    })
}

/// Reads an array header and walks its elements, keeping only their bytes.
fn read_array<'a>(cursor: &mut Cursor<'a>, what: &str, depth: usize) -> Result<Array<'a>, Error> {
    if depth > MAX_ARRAY_DEPTH {
        return Err(Error::Malformed {
            what: what.to_owned(),
            reason: format!("arrays are nested more than {MAX_ARRAY_DEPTH} deep"),
        });
    }
    let element = read_value_type(cursor, what)?;
    let len = cursor.u64(what)?;
    let start = cursor.at();
    match element {
        ValueType::String | ValueType::Array | ValueType::Bool => {
            // The count is checked against the fewest bytes it can take before it is walked.
            let least = len.saturating_mul(element.least_bytes());
            if least > cursor.left() {
                cursor.take(least, what)?;
            }
            for _ in 0..len {
                read_value(cursor, element, what, depth)?;
            }
        }
        fixed => {
            cursor.take(len.saturating_mul(fixed.least_bytes()), what)?;
        }
    }
    // No truncation: each element took at least a byte of a slice.
    Ok(Array {
        element,
        len: len as usize,
        bytes: cursor.since(start),
    })
}

/// Reads and checks a value type id.
pub(super) fn read_value_type(cursor: &mut Cursor<'_>, what: &str) -> Result<ValueType, Error> {
    let id = cursor.u32(what)?;
    ValueType::from_id(id).ok_or_else(|| Error::Malformed {
        what: what.to_owned(),
        reason: format!("unknown metadata value type {id}"),
    })
}

/// The metadata of a file, in file order.
///
/// Getters ending in `_opt` give `None` when the key is absent; the others make that an error.
/// All make a value of another type an error that names the key.
#[derive(Debug, Clone, Default)]
pub struct Metadata<'a> {
    entries: Vec<(&'a str, Value<'a>)>,
    index: HashMap<&'a str, usize>,
}

impl<'a> Metadata<'a> {
    pub(super) fn read(cursor: &mut Cursor<'a>, count: u64) -> Result<Self, Error> {
        let mut metadata = Metadata::default();
        for i in 0..count {
            let key = cursor.string(&format!("key of metadata entry {i} of {count}"))?;
            if key.is_empty() || key.len() > MAX_KEY_BYTES {
                return Err(Error::Malformed {
                    what: format!("metadata entry {i}"),
                    reason: format!("a key has 1 to {MAX_KEY_BYTES} bytes, not {}", key.len()),
                });
            }
            let what = format!("metadata key {}", shown(key));
            let value_type = read_value_type(cursor, &what)?;
            let value = read_value(cursor, value_type, &what, 0)?;
            if metadata.index.insert(key, metadata.entries.len()).is_some() {
                return Err(Error::Malformed {
                    what,
                    reason: "given twice".to_owned(),
                });
            }
            metadata.entries.push((key, value));
        }
        Ok(metadata)
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&'a str, &Value<'a>)> {
        self.entries.iter().map(|(key, value)| (*key, value))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// No entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key`, of any type.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(Error::KeyType {
                key: shown(key),
                found: match value {
                    Value::Array(array) => array.describe(),
                    other => other.value_type().name().to_owned(),
                },
                expected,
            }),
        }
    }

    /// Text, if present.
    pub fn string_opt(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.typed(key, "a string", |v| match v {
            Value::String(s) => Some(*s),
            _ => None,
        })
    }

    /// Text.
    pub fn string(&self, key: &str) -> Result<&'a str, Error> {
        required(key, self.string_opt(key)?)
    }

    /// A non-negative integer of any width, if present.
    pub fn u64_opt(&self, key: &str) -> Result<Option<u64>, Error> {
        match self.typed(key, "an integer", Value::integer)? {
            None => Ok(None),
            Some(v) => u64::try_from(v).map(Some).map_err(|_| Error::KeyValue {
                key: shown(key),
                reason: format!("{v} is negative"),
            }),
        }
    }

    /// A non-negative integer of any width.
    pub fn u64(&self, key: &str) -> Result<u64, Error> {
        required(key, self.u64_opt(key)?)
    }

    /// A float of either width, if present.
    pub fn f64_opt(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a float", |v| match *v {
            Value::F32(f) => Some(f64::from(f)),
            Value::F64(f) => Some(f),
            _ => None,
        })
    }

    /// A float of either width.
    pub fn f64(&self, key: &str) -> Result<f64, Error> {
        required(key, self.f64_opt(key)?)
    }

    /// A truth value, if present.
    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "a bool", |v| match *v {
            Value::Bool(b) => Some(b),
            _ => None,
        })
    }

    /// An array of any element type, if present.
    pub fn array_opt(&self, key: &str) -> Result<Option<Array<'a>>, Error> {
        self.typed(key, "an array", |v| match *v {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    /// An array of strings, if present.
    pub fn strings_opt(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = &'a str> + use<'a>>, Error> {
        let array = self.typed(key, "an array of strings", |v| match *v {
            Value::Array(array) if array.element == ValueType::String || array.is_empty() => {
                Some(array)
            }
            _ => None,
        })?;
        Ok(array.map(|array| {
            array.iter().map(|v| match v {
                Value::String(s) => s,
                _ => "",
            })
        }))
    }

    /// An array of strings.
    pub fn strings(
        &self,
        key: &str,
    ) -> Result<impl ExactSizeIterator<Item = &'a str> + use<'a>, Error> {
        required(key, self.strings_opt(key)?)
    }

    /// An array of integers of any width up to 64 bits signed, if present.
    pub fn integers_opt(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = i64> + use<'a>>, Error> {
        let array = self.typed(key, "an array of integers", |v| match *v {
            Value::Array(array) => match array.element {
                ValueType::U8
                | ValueType::I8
                | ValueType::U16
                | ValueType::I16
                | ValueType::U32
                | ValueType::I32
                | ValueType::I64 => Some(array),
                _ => None,
            },
            _ => None,
        })?;
        // The types above all fit in an i64.
        Ok(array.map(|array| array.iter().map(|v| v.integer().unwrap_or(0) as i64)))
    }

    /// An array of 32-bit floats, if present.
    pub fn floats_opt(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = f32> + use<'a>>, Error> {
        let array = self.typed(key, "an array of f32", |v| match *v {
            Value::Array(array) if array.element == ValueType::F32 => Some(array),
            _ => None,
        })?;
        Ok(array.map(|array| {
            array.iter().map(|v| match v {
                Value::F32(f) => f,
                _ => 0.0,
            })
        }))
    }
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, Error> {
    value.ok_or_else(|| Error::MissingKey { key: shown(key) })
}
