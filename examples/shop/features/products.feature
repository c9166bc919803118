Feature: Products

  Scenario: The list shows a product and its price
    Given a kettle for 1999 cents
    When a guest looks at the products
    Then the page shows the kettle at 19.99

  Scenario: A search finds one product of many
    Given a kettle
    And a pan
    And a lamp
    When a guest searches for the kettle
    Then the page shows the kettle
    And the page does not show the pan
    And the page does not show the lamp

  Scenario: A name is no markup
    Given a kettle named "<b>bold</b>"
    When a guest searches for "bold"
    Then the page does not show the kettle
