package stack

import "testing"

// However many connections stand, their buffers stay within what transport.go promises.
func TestBuffersAreBounded(t *testing.T) {
	var sum, last int64 = 0, maxBuffer
	for n := int64(1); n <= 20000; n++ {
		b := bufferFor(n)
		if b > last || b < leastBuffer {
			t.Fatalf("connection %d may have %d octets, the one before %d", n, b, last)
		}
		sum, last = sum+b, b
		if limit := int64(512<<20) + n*leastBuffer; sum > limit {
			t.Fatalf("%d connections may have %d octets, limit %d", n, sum, limit)
		}
	}
	if bufferFor(1) != maxBuffer || bufferFor(20000) != leastBuffer {
		t.Errorf("the first may have %d, the last %d", bufferFor(1), bufferFor(20000))
	}
}
