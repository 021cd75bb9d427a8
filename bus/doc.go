// Package bus carries what happens in a pool: an embedded NATS server per host, a door for local processes, events, mirrored
// state, the agents' status and a history.
//
// What it promises. Messages of one publisher reach one subscriber in their order or not at all. A Mirror that says Fresh
// holds exactly what its Table had at one sequence, at most three signs of life ago. Publishing never waits for a slow
// subscriber.
//
// What it does not promise. Delivery: a slow or cut-off subscriber loses messages; a mirror notices and lists again, a plain
// subscriber does not. Order between two publishers. That another mirror is where yours is. That the history is complete: it is a
// convenience, and a full disk ends it without a word to those who publish.
//
// Duty of a subscriber: return soon. 8192 messages wait for one subscription, then messages are lost.
package bus
