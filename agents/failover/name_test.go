package failover

import "testing"

func TestNodeName(t *testing.T) {
	res := []byte("resource \"db\" {\n    on \"xcp1\" {\n        volume 0 {\n        }\n    }\n    on xcp2.example.org {\n    }\n  on \"XCP3\" {\n  }\n" +
		"    on \"twin.a\" {\n    }\n    on \"twin.b\" {\n    }\n    connection {\n        host \"xcp9\" address ipv4 10.0.0.9:7000;\n    }\n}\n")
	for _, tt := range []struct {
		kernel, want string
		ok           bool
	}{
		{"xcp1", "xcp1", true},
		{"xcp1.example.org", "xcp1", true},
		{"xcp2", "xcp2.example.org", true},
		{"xcp2.example.org", "xcp2.example.org", true},
		{"xcp3", "XCP3", true},
		{"twin.b", "twin.b", true},
		{"twin", "twin", false},   // two would fit
		{"xcp9", "xcp9", false},   // no host section
		{"xcp", "xcp", false},     // a prefix is not the same
		{"xcp10", "xcp10", false}, // neither is a longer one
	} {
		if got, ok := NodeName(res, tt.kernel); got != tt.want || ok != tt.ok {
			t.Errorf("NodeName(%q) = %q, %v; want %q, %v", tt.kernel, got, ok, tt.want, tt.ok)
		}
	}
	if got, ok := NodeName(nil, "xcp1"); got != "xcp1" || ok {
		t.Errorf("without a file: %q, %v", got, ok)
	}
}
