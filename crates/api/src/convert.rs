//! proto ⇄ domain. Validation happens here, once, on receipt.
