//! What may be printed of messages that hold a key: nothing of the key.

use endio_api::conversion::store_command::Command;
use endio_api::conversion::{Registered, StoreCommand, StoreCommandBatch};
use endio_api::convert;
use endio_state_machine::machine::ToStore;
use endio_state_machine::token::TokenKey;
use endio_types::{ClusterEpoch, IoEndId, StoreId};

const KEY: [u8; 32] = *b"NobodyMayEverReadThisKeyInALog!!";

/// Every way in which a derived `Debug` would print some of the key.
fn is_shown(printed: &str) -> bool {
    let text = String::from_utf8_lossy(&KEY[..4]).into_owned();
    let numbers = format!("{}, {}", KEY[0], KEY[1]);
    let lines = format!("{},\n", KEY[0]);
    let hex: String = KEY[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    [text, numbers, lines, hex].iter().any(|part| printed.contains(part))
}

#[test]
fn no_message_that_holds_the_key_prints_it() {
    let registered = Registered { store: 4711, key: KEY.to_vec().into(), ..Registered::default() };
    let command = StoreCommand { command: Some(Command::Registered(registered.clone())) };
    let batch = StoreCommandBatch { commands: vec![command.clone()] };
    let domain = ToStore::Registered {
        store: StoreId(4711),
        epoch: ClusterEpoch(1),
        key: TokenKey::new(KEY),
        lease_ms: 1,
        floor: IoEndId(1),
    };
    let converted = convert::to_store(domain.clone()).unwrap();
    for printed in [
        format!("{registered:?} {registered:#?}"),
        format!("{command:?} {command:#?}"),
        format!("{batch:?} {batch:#?}"),
        format!("{domain:?} {domain:#?}"),
        format!("{converted:?} {converted:#?}"),
    ] {
        assert!(printed.contains("4711"), "the rest is shown: {printed}");
        assert!(!is_shown(&printed), "{printed}");
    }
    assert!(is_shown(&format!("{KEY:?}")), "a key that is printed would be found");
    assert!(is_shown(&format!("{:?}", registered.key)), "a key that is printed would be found");
}
