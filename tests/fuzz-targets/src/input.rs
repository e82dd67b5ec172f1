//! Numbers and pieces out of the fuzzer's bytes; at their end everything is zero.

/// What is left of the bytes.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    /// At most so many bytes.
    pub(crate) fn take(&mut self, most: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        head
    }

    pub(crate) fn u32(&mut self) -> u32 {
        let mut bytes = [0; 4];
        let head = self.take(4);
        bytes[..head.len()].copy_from_slice(head);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }
}

/// Changes a file as the input says: overwrites, cuts, appends.
pub(crate) fn damage(file: &mut Vec<u8>, input: &mut Input<'_>) {
    let (how, at) = (input.u8(), input.u32() as usize);
    let at = if file.is_empty() { 0 } else { at % file.len() };
    match how % 4 {
        0 => file.truncate(at),
        1 => {
            let length = usize::from(input.u8());
            file.extend_from_slice(input.take(length));
        }
        _ => {
            let length = usize::from(input.u8() % 32);
            let bytes = input.take(length);
            let end = (at + bytes.len()).min(file.len());
            file[at..end].copy_from_slice(&bytes[..end - at]);
        }
    }
}
