package ra

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func config() Config {
	return Config{
		Prefix:   netip.MustParsePrefix("fd00::/64"),
		MTU:      65520,
		DNS:      []netip.Addr{netip.MustParseAddr("fd00::3")},
		Search:   []string{"example.org"},
		LinkAddr: [6]byte{2, 0, 0, 0, 0, 2},
	}
}

const (
	header = "86000000" + "40000708" + "00000000" + "00000000" // hop limit 64, no flags, 1800 s
	source = "0101" + "020000000002"
	mtu    = "0501" + "0000" + "0000fff0"
	prefix = "0304" + "40c0" + "00015180" + "0000a8c0" + "00000000" + "fd000000000000000000000000000000"
	rdnss  = "1903" + "0000" + "00000708" + "fd000000000000000000000000000003"
	dnssl  = "1f03" + "0000" + "00000708" + "076578616d706c65" + "036f726700" + "000000"
)

func TestAdvertisement(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"everything", func(*Config) {}, header + source + mtu + prefix + rdnss + dnssl},
		{"nothing", func(c *Config) { *c = Config{} }, header},
		{"host bits of the prefix", func(c *Config) { c.Prefix = netip.MustParsePrefix("fd00::2/64") },
			header + source + mtu + prefix + rdnss + dnssl},
		{"no address from a /80", func(c *Config) { *c = Config{Prefix: netip.MustParsePrefix("fd00::/80")} },
			header + strings.Replace(prefix, "40c0", "5080", 1)},
		{"addresses are given out", func(c *Config) { *c = Config{Prefix: netip.MustParsePrefix("fd00::/64"), Static: true} },
			header + strings.Replace(prefix, "40c0", "4080", 1)},
		{"no router", func(c *Config) { *c = Config{NoRouter: true} }, strings.Replace(header, "0708", "0000", 1)},
		{"IPv4 prefix", func(c *Config) { *c = Config{Prefix: netip.MustParsePrefix("10.0.2.0/24")} }, header},
		{"small MTU", func(c *Config) { *c = Config{MTU: 1279} }, header},
		{"IPv4 name server", func(c *Config) { *c = Config{DNS: []netip.Addr{netip.MustParseAddr("10.0.2.3")}} }, header},
		{"two name servers", func(c *Config) {
			*c = Config{DNS: []netip.Addr{netip.MustParseAddr("fd00::3"), netip.MustParseAddr("fd00::4")}}
		}, header + strings.Replace(rdnss, "1903", "1905", 1) + "fd000000000000000000000000000004"},
		{"no names", func(c *Config) { *c = Config{Search: []string{"", ".", "a..b", strings.Repeat("x", 64)}} }, header},
		{"lifetime", func(c *Config) { *c = Config{Lifetime: time.Minute} }, strings.Replace(header, "0708", "003c", 1)},
		{"lifetime too long", func(c *Config) { *c = Config{Lifetime: 24 * time.Hour} }, strings.Replace(header, "0708", "2328", 1)},
	} {
		cfg := config()
		tt.change(&cfg)
		got := hex.EncodeToString(Advertisement(cfg))
		if got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

// However long the lists, each option stays within its length and the message is whole.
func TestLongListsAreCut(t *testing.T) {
	cfg := Config{}
	for range 1000 {
		cfg.DNS = append(cfg.DNS, netip.MustParseAddr("fd00::3"))
		cfg.Search = append(cfg.Search, strings.Repeat("a.", 100)+"example")
	}
	m := Advertisement(cfg)
	options := m[16:]
	for _, want := range []byte{optionServers, optionSearch} {
		n := int(options[1]) * 8
		if options[0] != want || n < 1800 || n > len(options) {
			t.Fatalf("option %d of %d octets", options[0], n)
		}
		options = options[n:]
	}
	if len(options) != 0 {
		t.Errorf("%d octets more", len(options))
	}
}

func TestIsSolicitation(t *testing.T) {
	for _, tt := range []struct {
		name, msg string
		want      bool
	}{
		{"bare", "85001234" + "00000000", true},
		{"with a link address", "85001234" + "00000000" + "0101020000000001", true},
		{"unknown option", "85001234" + "00000000" + "fd02000000000000" + "0000000000000000", true},
		{"reserved field set", "85001234" + "ffffffff", true}, // must be ignored: RFC 4861 §4.1
		{"empty", "", false},
		{"short", "85001234" + "000000", false},
		{"advertisement", "86001234" + "00000000", false},
		{"code", "85011234" + "00000000", false},
		{"option of length 0", "85001234" + "00000000" + "0100020000000001", false},
		{"option beyond the end", "85001234" + "00000000" + "0102020000000001", false},
		{"half an option", "85001234" + "00000000" + "01", false},
	} {
		msg, err := hex.DecodeString(tt.msg)
		if err != nil {
			t.Fatal(err)
		}
		if got := IsSolicitation(msg); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// What IsSolicitation takes has options that can be walked; nothing makes it crash.
func FuzzIsSolicitation(f *testing.F) {
	for _, s := range []string{"", "\x85\x00\x00\x00\x00\x00\x00\x00", "\x85\x00\x00\x00\x00\x00\x00\x00\x01\x01\x02\x00\x00\x00\x00\x01"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		if IsSolicitation(msg) && (len(msg) < 8 || len(msg)%8 != 0 || msg[0] != 133) {
			t.Errorf("%x", msg)
		}
	})
}
