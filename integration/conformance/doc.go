// Package conformance drives the lab's faces with clients that this project did not write. The tests need programs that setup.sh installs; without them they skip, or fail
// when XOSTOR_TEST_STRICT=1.
package conformance
