//! TPM 2.0 commands as bytes: the few that sealing takes. Numbers and layouts are those of "TPM 2.0 Library", parts 2
//! (structures) and 3 (commands), revision 1.59; all numbers big-endian.

use zeroize::Zeroizing;

pub(super) const TPM_ST_NO_SESSIONS: u16 = 0x8001;
pub(super) const TPM_ST_SESSIONS: u16 = 0x8002;

pub(super) const TPM_CC_CREATE_PRIMARY: u32 = 0x131;
pub(super) const TPM_CC_CREATE: u32 = 0x153;
pub(super) const TPM_CC_LOAD: u32 = 0x157;
pub(super) const TPM_CC_UNSEAL: u32 = 0x15e;
pub(super) const TPM_CC_FLUSH_CONTEXT: u32 = 0x165;
pub(super) const TPM_CC_POLICY_AUTH_VALUE: u32 = 0x16b;
pub(super) const TPM_CC_START_AUTH_SESSION: u32 = 0x176;
pub(super) const TPM_CC_GET_CAPABILITY: u32 = 0x17a;
pub(super) const TPM_CC_PCR_READ: u32 = 0x17e;
pub(super) const TPM_CC_POLICY_PCR: u32 = 0x17f;

pub(super) const TPM_RH_OWNER: u32 = 0x4000_0001;
pub(super) const TPM_RH_NULL: u32 = 0x4000_0007;
pub(super) const TPM_RS_PW: u32 = 0x4000_0009;

pub(super) const TPM_SE_HMAC: u8 = 0;
pub(super) const TPM_SE_POLICY: u8 = 1;

pub(super) const TPM_ALG_AES: u16 = 0x06;
pub(super) const TPM_ALG_KEYEDHASH: u16 = 0x08;
pub(super) const TPM_ALG_SHA256: u16 = 0x0b;
pub(super) const TPM_ALG_SHA384: u16 = 0x0c;
pub(super) const TPM_ALG_NULL: u16 = 0x10;
pub(super) const TPM_ALG_ECC: u16 = 0x23;
pub(super) const TPM_ALG_CFB: u16 = 0x43;
pub(super) const TPM_ECC_NIST_P256: u16 = 3;

pub(super) const TPM_CAP_TPM_PROPERTIES: u32 = 6;
pub(super) const TPM_PT_LOCKOUT_COUNTER: u32 = 0x20e;
pub(super) const TPM_PT_MAX_AUTH_FAIL: u32 = 0x20f;
pub(super) const TPM_PT_LOCKOUT_INTERVAL: u32 = 0x210;

/// Part 2, 8.3: bits of `TPMA_OBJECT`.
pub(super) const FIXED_TPM: u32 = 1 << 1;
pub(super) const FIXED_PARENT: u32 = 1 << 4;
pub(super) const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
pub(super) const USER_WITH_AUTH: u32 = 1 << 6;
pub(super) const NO_DA: u32 = 1 << 10;
pub(super) const RESTRICTED: u32 = 1 << 16;
pub(super) const DECRYPT: u32 = 1 << 17;

/// Part 2, 8.4: bits of `TPMA_SESSION`.
pub(super) const CONTINUE_SESSION: u8 = 1;
pub(super) const SESSION_DECRYPT: u8 = 1 << 5;
pub(super) const SESSION_ENCRYPT: u8 = 1 << 6;

/// No command or answer is longer: what `/dev/tpmrm0` takes.
pub(super) const MESSAGE_BYTES_MAX: usize = 4096;

/// Bytes under construction. Wiped when dropped, and with room from the start, so that growing leaves no copies.
pub(super) struct Writer(pub(super) Zeroizing<Vec<u8>>);

impl Writer {
    pub(super) fn new() -> Self {
        Self(Zeroizing::new(Vec::with_capacity(MESSAGE_BYTES_MAX)))
    }

    pub(super) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// A `TPM2B`: two bytes of length, then the bytes.
    pub(super) fn sized(self, bytes: &[u8]) -> Self {
        let len = u16::try_from(bytes.len()).expect("nothing of ours is that long");
        self.u16(len).bytes(bytes)
    }
}

/// Bytes being read. `None` where they end too early.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn u8(&mut self) -> Option<u8> {
        self.bytes(1).map(|bytes| bytes[0])
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes(2)?.try_into().ok()?))
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }

    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(super) fn sized(&mut self) -> Option<&'a [u8]> {
        let len = usize::from(self.u16()?);
        self.bytes(len)
    }
}

/// Part 2, 12.2.4: the storage root key as everybody makes it ("TCG TPM v2.0 Provisioning Guidance", 7.5.1: ECC P-256). The
/// same TPM makes the same key of it every time, until its owner is cleared.
pub(super) fn srk_template() -> Writer {
    Writer::new()
        .u16(TPM_ALG_ECC)
        .u16(TPM_ALG_SHA256)
        .u32(FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | RESTRICTED | DECRYPT)
        .sized(&[])
        // Parameters: symmetric, scheme, curve, key derivation.
        .u16(TPM_ALG_AES)
        .u16(128)
        .u16(TPM_ALG_CFB)
        .u16(TPM_ALG_NULL)
        .u16(TPM_ECC_NIST_P256)
        .u16(TPM_ALG_NULL)
        .sized(&[0; 32])
        .sized(&[0; 32])
}

/// The point of a public area that was made of [`srk_template`].
pub(super) fn srk_point(public: &[u8]) -> Option<([u8; 32], [u8; 32])> {
    let mut reader = Reader(public);
    if reader.u16()? != TPM_ALG_ECC || reader.u16()? != TPM_ALG_SHA256 {
        return None;
    }
    let _attributes = reader.u32()?;
    let _policy = reader.sized()?;
    let _parameters = reader.bytes(12)?;
    let mut coordinate = || {
        let bytes = reader.sized()?;
        let mut padded = [0; 32];
        // Leading zeroes may be left out.
        padded.get_mut(32_usize.checked_sub(bytes.len())?..)?.copy_from_slice(bytes);
        Some(padded)
    };
    Some((coordinate()?, coordinate()?))
}

/// Part 2, 10.9.7: one bank, 24 registers.
pub(super) fn pcr_selection(bank: u16, mask: u32) -> Writer {
    let [a, b, c, _] = mask.to_le_bytes();
    Writer::new().u32(1).u16(bank).u8(3).bytes(&[a, b, c])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_public_area_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = srk_point(&bytes);
            let _ = srk_point(&[&[0, 0x23, 0, 0x0b, 0, 0, 0, 0, 0, 0][..], &bytes].concat());
        }
    }

    #[test]
    fn short_coordinates_are_padded_in_front() {
        let public = Writer::new().u16(TPM_ALG_ECC).u16(TPM_ALG_SHA256).u32(0).sized(&[]).bytes(&[0; 12]);
        let (x, y) = srk_point(&public.sized(&[7; 31]).sized(&[8; 32]).0).unwrap();
        assert_eq!((x[0], x[1], y), (0, 7, [8; 32]));
    }

    #[test]
    fn a_selection_has_one_bit_for_each_register() {
        assert_eq!(hex::encode(&*pcr_selection(TPM_ALG_SHA256, 1 << 7 | 1 << 11).0), "00000001000b03800800");
    }
}
