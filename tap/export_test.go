package tap

var ExplainTUN = explainTUN

const (
	AliasOurs       = aliasOurs
	AliasUnfinished = aliasUnfinished
)

// Control is a descriptor of the device that lives as long as it.
func (d *Device) Control() int { return d.control }
